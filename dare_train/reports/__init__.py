"""From what was measured to tables, pictures, pages and wandb."""
