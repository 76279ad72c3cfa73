"""Every architecture that the installed transformers can build tiny, from its files to packages and back."""
