from tiny import image_folder, no_lpips, tiny_prior  # noqa: F401 (fixtures)
from tiny_checkpoints import checkpoints  # noqa: F401 (fixture)
