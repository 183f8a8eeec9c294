"""The command line `xai-edit`."""
