"""Numbers of the original tracker (fp32, CPU) on deterministic weights: eight frames, with and without selection."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from golden import table, tracker_value

from sam3.config import Sam3Config
from sam3.model.grid_tables import RotaryTable, SineTable
from sam3.model.memory_bank import FrameRecord, MemoryBank, attended_memories, attended_pointers
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures, temporal_code

NUM_FRAMES = 40
SAMPLES = [(0, 0, 0, 0), (0, 0, 30, 20), (1, 0, -1, -1)]


@dataclass(frozen=True)
class Expected:
    """One line of the published tables."""

    frame: int
    mean: float
    std: float
    masks: tuple[float, float, float]
    scores: tuple[float, float]
    tokens: tuple[int, int] | None = None
    pointers: tuple[float, float, float] | None = None
    memory: tuple[float, float, float, float, float] | None = None
    ious: tuple[float, float] | None = None
    effective_iou: float | None = None


PLAIN = (
    Expected(
        0,
        *(-1.47258, 1.42246, (0.11280, -1.55735, -1.55253), (2.20019, 2.23967)),
        pointers=(-0.46646, -0.21201, -0.01226),
        memory=(-0.03503, 0.84332, 0.55192, 1.21909, -0.85310),
    ),
    Expected(
        1,
        *(0.13504, 1.20072, (-0.31810, -0.82713, 1.39568), (2.47447, 2.47973), (260, 4)),
        pointers=(-0.15565, 0.55490, 0.43442),
        memory=(-0.00260, 0.88318, -0.73759, 0.04532, 0.07620),
    ),
    Expected(
        2,
        *(0.15247, 1.22461, (-0.60437, 1.02801, 2.08718), (2.34857, 2.35294), (520, 8)),
        pointers=(-0.01490, 0.56122, 0.37480),
        memory=(-0.00833, 0.88920, 0.29026, 0.16304, -1.19341),
    ),
    Expected(
        3,
        *(0.20285, 1.20894, (-1.96141, -0.21775, 2.28556), (2.35363, 2.34868), (780, 12)),
        pointers=(0.00836, 0.55405, 0.39893),
        memory=(-0.00053, 0.88048, -0.87575, 1.83233, -0.86863),
    ),
    Expected(
        4,
        *(-8.59375, 5.02554, (-10.0, 10.0, -10.0), (10.0, -10.0)),
        pointers=(0.01203, -0.20762, 0.39761),
        memory=(-0.03380, 0.94101, 0.32296, 2.13142, -1.88643),
    ),
    Expected(
        5,
        *(0.08878, 1.24443, (-0.44800, -0.18616, -0.23645), (2.44763, 2.27956), (1300, 20)),
        pointers=(-0.00439, 0.62064, 0.44426),
        memory=(-0.01353, 0.87569, 2.03461, 0.74248, -0.64487),
    ),
    Expected(
        6,
        *(0.10249, 1.24337, (-1.39144, 0.91464, 1.49021), (1.87843, 1.98409), (1560, 24)),
        pointers=(-0.29391, -0.13151, 0.64784),
        memory=(-0.00059, 0.89413, 0.57520, 1.17671, 0.08696),
    ),
    Expected(
        7,
        *(0.12160, 1.20274, (1.27132, -0.84318, 0.78721), (2.40719, 2.30179), (1820, 28)),
        pointers=(0.03821, 0.53137, 0.40630),
        memory=(-0.01129, 0.88441, 0.78885, 2.04327, -0.84069),
    ),
)
SELECTED = (
    Expected(
        0,
        *(PLAIN[0].mean, PLAIN[0].std, PLAIN[0].masks, PLAIN[0].scores),
        ious=(0.46548, 0.42257),
        effective_iou=0.35701,
    ),
    Expected(
        1,
        *(PLAIN[1].mean, PLAIN[1].std, PLAIN[1].masks, PLAIN[1].scores, (260, 4)),
        ious=(0.53770, 0.53407),
        effective_iou=0.45284,
    ),
    Expected(
        2,
        *(0.15317, 1.22407, (-0.61302, 1.03315, 2.07631), (2.34757, 2.35270), (516, 4)),
        ious=(0.50030, 0.49603),
        effective_iou=0.41143,
    ),
    Expected(
        3,
        *(0.20325, 1.20879, (-1.95824, -0.22051, 2.27989), (2.35178, 2.34659), (776, 8)),
        ious=(0.48317, 0.47847),
        effective_iou=0.39703,
    ),
    Expected(4, *(PLAIN[4].mean, PLAIN[4].std, PLAIN[4].masks, PLAIN[4].scores)),
    Expected(
        5,
        *(0.08905, 1.24448, (-0.44386, -0.18898, -0.24157), (2.44668, 2.27924), (1296, 16)),
        ious=(0.49427, 0.50303),
        effective_iou=0.41261,
    ),
    Expected(
        6,
        *(0.11697, 1.24586, (-1.38570, 0.92065, 1.48782), (1.88245, 1.98263), (1556, 20)),
        ious=(0.50091, 0.54114),
        effective_iou=0.38913,
    ),
    Expected(
        7,
        *(0.12131, 1.20357, (1.26948, -0.84830, 0.76994), (2.40509, 2.30576), (1816, 24)),
        ious=(0.47676, 0.49318),
        effective_iou=0.40086,
    ),
)


def frame_features(frame_idx: int) -> TrackerFeatures:
    shapes = [(1, 32, 64, 64), (1, 64, 32, 32), (1, 256, 16, 16)]
    return TrackerFeatures(*(table(f"input.frame{frame_idx}.level{i}", shape) for i, shape in enumerate(shapes)))


@pytest.fixture(scope="module")
def tracker() -> Sam3Tracker:
    tracker = Sam3Tracker(Sam3Config(image_size_px=224), memory_dtype=torch.float32).eval()
    tracker.load_state_dict({key: tracker_value(key, value.shape) for key, value in tracker.state_dict().items()})
    return tracker


@torch.no_grad()
def run_sequence(tracker: Sam3Tracker) -> tuple[MemoryBank, dict[int, tuple[int, int]]]:
    """The published sequence, and how many tokens, and how many of pointers, each frame attended to."""
    bank, tokens = MemoryBank(), {}
    mask = torch.zeros(2, 1, 256, 256)
    mask[0, 0, 64:160, 32:128] = 1
    clicks = torch.tensor([[[60.0, 80.0]], [[150.0, 40.0]]]), torch.ones(2, 1, dtype=torch.long)
    corrections = torch.tensor([[[100.0, 100], [30, 200]], [[20, 30], [210, 120]]]), torch.tensor([[1, 0], [2, 3]])
    prompts: dict[int, dict] = {
        0: {"point_inputs": clicks, "is_init_cond_frame": True},
        4: {"mask_inputs": mask, "is_init_cond_frame": True},
        6: {"point_inputs": corrections, "prev_sam_mask_logits": 20 * table("input.prev", (2, 1, 64, 64))},
    }
    for t in range(8):
        memories = attended_memories(bank, t, tracker.settings, NUM_FRAMES)
        pointers = attended_pointers(bank, t, tracker.settings, NUM_FRAMES)
        tokens[t] = (256 * len(memories) + 4 * len(pointers), 4 * len(pointers))
        arguments = {"is_init_cond_frame": False} | prompts.get(t, {})
        record = tracker.track_step(t, frame_features(t), bank, num_frames=NUM_FRAMES, **arguments)
        (bank.cond if t in prompts else bank.non_cond)[t] = record
    return bank, tokens


@pytest.fixture(scope="module")
def plain(tracker: Sam3Tracker) -> tuple[MemoryBank, dict[int, tuple[int, int]]]:
    return run_sequence(tracker)


@pytest.fixture(scope="module")
def selected(tracker: Sam3Tracker) -> tuple[MemoryBank, dict[int, tuple[int, int]]]:
    tracker.settings = tracker.settings.replace(use_memory_selection=True)
    try:
        return run_sequence(tracker)
    finally:
        tracker.settings = tracker.config.tracker


def compare(record: FrameRecord, tokens: tuple[int, int], expected: Expected) -> None:
    masks = record.pred_masks
    assert masks is not None and masks.shape == ((2, 1, 72, 72) if expected.frame == 4 else (2, 1, 64, 64))
    assert [masks.mean().item(), masks.std().item()] == pytest.approx([expected.mean, expected.std], abs=5e-5)
    assert [masks[i].item() for i in SAMPLES] == pytest.approx(expected.masks, abs=1e-4)
    assert record.object_score_logits.flatten().tolist() == pytest.approx(expected.scores, abs=5e-5)
    if expected.tokens is not None:
        assert tokens == expected.tokens
    if expected.pointers is not None:
        found = [record.obj_ptr[i].item() for i in ((0, 0), (0, 100), (1, 255))]
        assert found == pytest.approx(expected.pointers, abs=5e-5)
    if expected.memory is not None:
        memory = record.maskmem_features
        assert memory is not None and memory.shape == (2, 64, 16, 16)
        values = [memory.mean(), memory.std(), memory[0, 0, 0, 0], memory[0, 33, 7, 11], memory[1, 63, 15, 15]]
        assert [value.item() for value in values] == pytest.approx(expected.memory, abs=1e-4)
    if expected.ious is not None:
        assert record.iou_score is not None and record.eff_iou_score is not None
        assert record.iou_score.tolist() == pytest.approx(expected.ious, abs=5e-5)
        assert record.eff_iou_score.tolist() == pytest.approx([expected.effective_iou] * 2, abs=5e-5)


@pytest.mark.parametrize("expected", PLAIN, ids=lambda e: f"frame{e.frame}")
def test_frame_without_memory_selection(plain: tuple, expected: Expected) -> None:
    bank, tokens = plain
    compare((bank.cond | bank.non_cond)[expected.frame], tokens[expected.frame], expected)


@pytest.mark.parametrize("expected", SELECTED, ids=lambda e: f"frame{e.frame}")
def test_frame_with_memory_selection(selected: tuple, expected: Expected) -> None:
    bank, tokens = selected
    compare((bank.cond | bank.non_cond)[expected.frame], tokens[expected.frame], expected)


@pytest.mark.parametrize(
    ("frame", "mean", "std", "samples"),
    [
        (1, -0.00022, 1.03861, {(0, 0, 0): 0.24614, (100, 1, 200): 2.06464}),
        (7, -0.00123, 1.03381, {(0, 0, 0): 0.34698, (100, 1, 200): 1.27524}),
    ],
)
@torch.no_grad()
def test_conditioned_features(
    tracker: Sam3Tracker, plain: tuple, frame: int, mean: float, std: float, samples: dict
) -> None:
    full, _ = plain
    bank = MemoryBank(*({t: r for t, r in store.items() if t < frame} for store in (full.cond, full.non_cond)))
    out = tracker.condition(frame, frame_features(frame), bank, NUM_FRAMES)
    assert out.shape == (2, 256, 16, 16)
    tokens_first = out.flatten(2).permute(2, 0, 1)
    assert [out.mean().item(), out.std().item()] == pytest.approx([mean, std], abs=2e-5)
    for index, expected in samples.items():
        assert tokens_first[index].item() == pytest.approx(expected, abs=1e-4)


def test_rotary_positions_of_the_released_grid() -> None:
    turns = torch.view_as_complex(RotaryTable(256, 10000.0, 72).table)
    expected = torch.tensor([0.54030 + 0.84147j, 0.64791 + 0.76172j, 0.54030 + 0.84147j])
    torch.testing.assert_close(turns[73, [0, 1, 64]], expected, atol=1e-5, rtol=0)


def test_code_of_positions_in_time() -> None:
    code = temporal_code(torch.tensor([3 / 15]), 256)[0]
    assert code.shape == (256,)
    expected = torch.tensor([0.198669, 0.198669, 0.172322, 0.980067])
    torch.testing.assert_close(code[[0, 1, 2, 128]], expected, atol=1e-5, rtol=0)


def test_sine_code_of_a_memory() -> None:
    expected = torch.tensor([0.087156, 0.996195, 0.049054, 0.087156])
    torch.testing.assert_close(SineTable(64, 72).table[0, [0, 1, 2, 32]], expected, atol=1e-6, rtol=0)
