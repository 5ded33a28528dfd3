"""A whole stage-1 world at the size of a test: photos, a random tiny teacher, its stored embeddings, config files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from fixtures_data import make_sa1b_tree

from sam3.checkpoint_io import write_merged
from sam3.config import Sam3Config
from sam3.model_builder import assemble_image_model, build_sam3_trunk
from sam3.preprocess import Preprocess
from sam3.released_names import released_state_dict
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.embeddings import EmbeddingWriter, StoreSpec, begin_export
from sam3_train.teacher import Teacher

TINY = Sam3Config.preset("tiny")
NUM_TRAIN, NUM_VAL = 12, 3


@dataclass(frozen=True)
class Stage1World:
    """Paths of the world."""

    root: Path
    data: Path
    teacher: Path
    store: Path

    def config(self, name: str, backbone: str = "demo_cnn", **settings: object) -> Path:
        """A config file for a student that starts from random weights; ``settings`` are dotted keys with ``__``."""
        lines = {
            "DATA.DATA_PATH": self.data,
            "DATA.BATCH_SIZE": 4,
            "DATA.NUM_WORKERS": 0,
            "MODEL.NAME": name,
            "MODEL.PRESET": "tiny",
            "MODEL.BACKBONE": backbone,
            "MODEL.PRETRAINED": "random",
            "MODEL.SAM3_CHECKPOINT": self.teacher,
            "DISTILL.TEACHER_EMBED_PATH": self.store,
            "DISTILL.STATISTICS_IMAGES": 4,
            "TRAIN.EPOCHS": 1,
            "TRAIN.WARMUP_EPOCHS": 0.0,
            "TRAIN.LR_SCALING": "none",
            "TRAIN.SAVE_EVERY_MINUTES": 0.0,
            "PRINT_FREQ": 1,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        tree: dict = {}
        for key, value in lines.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = str(value) if isinstance(value, Path) else value
        path = self.root / f"{name}.yaml"
        import yaml

        path.write_text(yaml.safe_dump(tree))
        return path


def make_random_teacher(path: Path, seed: int = 0) -> Path:
    """A file in the released layout that holds the tiny preset with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = assemble_image_model(TINY, enable_inst_interactivity=True, enable_detector=False)
    write_merged(path, released_state_dict(model), {"variant": "tiny", "model": TINY.to_dict()})
    return path


def make_store(
    directory: Path, data: Path, teacher_path: Path, preprocess: Preprocess | None = None, codec: str = "fp16"
) -> Path:
    """Embeddings of both splits, written through the store's own writer."""
    from sam3_train.data.image_index import build_image_index

    preprocess = preprocess or Preprocess(TINY.image_size_px)
    trunk = build_sam3_trunk(teacher_path, config=TINY, device="cpu")
    teacher = Teacher(trunk, TINY, preprocess, torch.device("cpu"))
    spec = StoreSpec(TINY.embedding_shape, codec, teacher.description, preprocess.to_dict())
    indices = [build_image_index(data, "sa1b", split) for split in ("train", "val")]
    keys = [key for index in indices for key in index.keys]
    begin_export(directory, spec, keys)
    with EmbeddingWriter(directory) as writer:
        for index in indices:
            dataset = DistillationDataset(index, preprocess, "export", TINY.grid_size)
            for i in range(len(index)):
                item = dataset[i]
                features = teacher(item["image"][None]).to(torch.float16).numpy()
                writer.put(item["key"], item["seed"], features[0])
    return directory


def make_world(root: Path, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Stage1World:
    """Everything below ``root``."""
    data = make_sa1b_tree(root / "photos", train=range(num_train), val=range(1000, 1000 + num_val))
    teacher = make_random_teacher(root / "teacher.safetensors")
    store = make_store(root / "embeddings", data, teacher)
    return Stage1World(root, data, teacher, store)
