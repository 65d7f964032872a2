import pytest
from tiny import RESOLUTION, image_folder, no_lpips, tiny_prior, write_images  # noqa: F401 (fixtures)

from particledaps.data.training_views import Augmentation, load_training_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("training") / "images", 24, size=(40, 36))
    return load_training_images(folder, None, RESOLUTION, Augmentation(0.5, 0.5))
