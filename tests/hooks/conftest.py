from tiny import image_folder, no_lpips, no_sheets, tiny_prior  # noqa: F401 (fixtures)
