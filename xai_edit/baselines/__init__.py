"""What a sceptic would do instead."""
