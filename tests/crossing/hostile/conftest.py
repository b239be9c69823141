from tests.crossing.fixtures import model_folder, vlm

__all__ = ["model_folder", "vlm"]
