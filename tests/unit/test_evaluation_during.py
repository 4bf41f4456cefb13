"""Prompts of an evaluation during training: one rank encodes them, while the others wait for as long as it takes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from piflow_dist.evaluation import during
from piflow_dist.sampling.control import PATIENCE

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(("has_room", "tried"), [(True, [GPU]), (False, [GPU, CPU])])
def test_prompts_are_encoded_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, has_room: bool, tried: list[torch.device]
) -> None:
    asked, emptied, groups = [], [], {}
    encoder = SimpleNamespace(encode=lambda prompts: [torch.ones(len(prompt), 2) for prompt in prompts], cut=str.strip)

    def load(description: dict, device: torch.device) -> SimpleNamespace:
        asked.append(device)
        if device == GPU and not has_room:
            raise torch.OutOfMemoryError("no room")
        return encoder

    def broadcast(told: list, src: int, group: str) -> None:
        assert groups[group] == ("gloo", PATIENCE) and src == 0

    monkeypatch.setattr(during, "load_prompt_encoder", load)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: groups.update(new=(backend, timeout)) or "new")
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    topology = SimpleNamespace(is_main=True, device=GPU)
    text_BLD, mask_BL = during.encode(["a", "abc"], SimpleNamespace(prompt_encoder={}), topology)
    assert asked == tried and emptied == [True]
    assert text_BLD.shape == (2, 3, 2) and mask_BL.sum(1).tolist() == [1, 3]
