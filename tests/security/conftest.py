from tests.crossing.fixtures import cloud, model_folder, picture, vlm

__all__ = ["cloud", "model_folder", "picture", "vlm"]
