"""What handles have in common: how one is read, and how one travels. Each kind of handle adds only its own part."""
