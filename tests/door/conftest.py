from tests.crossing.fixtures import model_folder, picture, vlm

__all__ = ["model_folder", "picture", "vlm"]
