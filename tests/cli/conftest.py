from tests.crossing.fixtures import cloud, edge, model_folder, other_folder, picture, vlm

__all__ = ["cloud", "edge", "model_folder", "other_folder", "picture", "vlm"]
