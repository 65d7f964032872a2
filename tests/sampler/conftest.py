from tiny_checkpoints import checkpoints  # noqa: F401 (fixture)
