"""What a merge is told: options, configuration files, and what they come to for each tensor."""
