"""Compressed momentum with a second moment that learns now and then, held against the paper's formulas in this file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replicas import CLIP_NORM, STEPS, TARGET, Replica, plan_text, samples_of
from torch import Tensor

from shoal.errors import ShoalError
from shoal.plan import parse_plan
from shoal.plan.parts import build_coder
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.flat import Flat, gradient_buckets
from shoal.strategy.topology import topologies
from training_runs import events_of, final_state, final_tensors, train_on

EVERY, WARM_UP = 4, 3


def codec_text(kind: str) -> str:
    return f'kind = "{kind}"\nvariance_every = {EVERY}\nwarmup_steps = {WARM_UP}'


def plan(kind: str, steps: int = STEPS) -> str:
    text = plan_text('bucket_mb = 0.0005\nform = "flat"', steps=steps)
    return text.replace('kind = "none"', codec_text(kind))


class Reference:
    """All ranks in one process: own buckets, own Adam, the project's codecs."""

    def __init__(self, kind: str, num_ranks: int) -> None:
        plan = parse_plan(f"seed = 5\n[codec]\n{codec_text(kind)}", origin="test")
        self.coders = [build_coder(plan, view) for view in topologies("abcd"[:num_ranks])]
        self.replica = Replica(0)
        named = [(n, p) for n, p in self.replica.model.named_parameters() if p.requires_grad]
        self.laid = gradient_buckets(named, 500)
        self.group_of = {p: group for group in self.replica.optimizer.param_groups for p in group["params"]}
        zeros = {p: torch.zeros_like(p) for _, p in named}
        self.mean, self.variance = dict(zeros), {p: torch.zeros_like(p) for p in zeros}
        self.steps, self.learned = dict.fromkeys(zeros, 0), dict.fromkeys(zeros, 0)
        self.factor = 1.0

    def step(self, number: int, shares: list[list[int]]) -> None:
        gradients = [self.gradient(samples, sum(map(len, shares))) for samples in shares]
        used = {p for own in gradients for p in own}
        exact = number <= WARM_UP or number % EVERY == 0
        for coder in self.coders:
            for bucket in self.laid:
                coder.begin(bucket.name)
        if exact:
            self.learn(self.sums(gradients, rounded=number > WARM_UP))
        else:
            for bucket in self.laid:
                self.take_compressed(bucket, gradients)
        for p in used:
            self.update(p)
        self.replica.model.zero_grad()
        self.replica.optimizer.step()  # of nothing: its own steps are not used here
        self.replica.schedule.step()

    def gradient(self, samples: list[int], batch: int) -> dict[torch.nn.Parameter, Tensor]:
        self.replica.model.zero_grad()
        if samples:
            data = self.replica.data[torch.tensor(samples)]
            (self.replica.job.loss(self.replica.model, data) * len(samples) / batch).backward()
        return {p: p.grad.clone() for p in self.mean if p.grad is not None}

    def sums(
        self, gradients: list[dict[torch.nn.Parameter, Tensor]], *, rounded: bool
    ) -> dict[torch.nn.Parameter, Tensor]:
        total = {
            p: sum(own[p] for own in gradients if p in own) for p in self.mean if any(p in own for own in gradients)
        }
        if rounded:
            eights = [coder.learning for coder in self.coders]
            for bucket in self.laid:
                flat = self.sum(bucket.name, [self.flat(bucket, own) for own in gradients], eights)
                total |= {p: value for p, value in self.parts(bucket, flat) if p in total}
        return total

    def flat(self, bucket: Flat, values: dict[torch.nn.Parameter, Tensor]) -> Tensor:
        out = torch.zeros(bucket.num_values, dtype=torch.float64)
        for p, piece in zip(bucket.parameters, bucket.pieces, strict=True):
            if p in values:
                out[piece.offset : piece.offset + p.numel()] = values[p].flatten()
        return out

    def parts(self, bucket: Flat, flat: Tensor) -> list[tuple[torch.nn.Parameter, Tensor]]:
        pairs = zip(bucket.parameters, bucket.pieces, strict=True)
        return [(p, flat[piece.offset : piece.offset + p.numel()].view_as(p).clone()) for p, piece in pairs]

    def learn(self, total: dict[torch.nn.Parameter, Tensor]) -> None:
        norm = torch.stack([g.square().sum() for g in total.values()]).sum().sqrt().item()
        self.factor = min(1.0, CLIP_NORM / (norm + 1e-6))
        for p, gradient in total.items():
            b1, b2 = self.group_of[p]["betas"]
            clipped = gradient * self.factor
            # The estimate is kept without bias; Adam's average goes on as if it had learned in every step.
            before = self.variance[p] * (1 - b2 ** self.steps[p])
            self.mean[p] = b1 * self.mean[p] + (1 - b1) * clipped
            self.variance[p] = (b2 * before + (1 - b2) * clipped**2) / (1 - b2 ** (self.steps[p] + 1))
            self.learned[p] = 1

    def take_compressed(self, bucket: Flat, gradients: list[dict[torch.nn.Parameter, Tensor]]) -> None:
        root = self.flat(bucket, self.variance).sqrt()
        units = root.clamp(min=max(1e-3 * root.square().mean().sqrt().item(), torch.finfo(root.dtype).tiny))
        b1, mean = 0.9, self.flat(bucket, self.mean)
        kept = b1 / len(gradients) * mean
        parts = [(kept + (1 - b1) * self.factor * self.flat(bucket, own)) / units for own in gradients]
        flags = {p for own in gradients for p in own}
        for p, value in self.parts(bucket, self.sum(bucket.name, parts, self.coders) * units):
            if p in flags and self.learned[p]:
                self.mean[p] = value

    def sum(self, name: str, parts: list[Tensor], coders: list[Coder]) -> Tensor:
        length = -(-len(parts[0]) // len(parts))
        pad = (0, length * len(parts) - len(parts[0]))
        rows = [torch.nn.functional.pad(part, pad).view(len(parts), length) for part in parts]
        summed = torch.zeros_like(rows[0])
        for coder, own in zip(coders, rows, strict=True):
            summed += coder.decode(coder.encode(name, own), length, own)
        back = [
            coder.decode(coder.encode(name, row[None], stage="sum"), length, row)
            for coder, row in zip(coders, summed, strict=True)
        ]
        return torch.cat(back).flatten()[: len(parts[0])]

    def update(self, p: torch.nn.Parameter) -> None:
        if not self.learned[p]:
            return
        group = self.group_of[p]
        self.steps[p] += 1
        with torch.no_grad():
            p.mul_(1 - group["lr"] * group["weight_decay"])
            unbiased = self.mean[p] / (1 - group["betas"][0] ** self.steps[p])
            p.sub_(group["lr"] * unbiased / (self.variance[p].sqrt() + group["eps"]))


@pytest.mark.parametrize("kind", ["topk", "int8"])
@pytest.mark.parametrize("nodes", ["ab", "abc"])
def test_it_is_the_papers_formulas(kind: str, nodes: str, tmp_path: Path) -> None:
    run = train_on(list(nodes), TARGET, plan(kind), tmp_path / "run")
    reference = Reference(kind, len(nodes))
    for step in range(STEPS):
        reference.step(step + 1, samples_of(step, (1.0,) * len(nodes)))
    trained = final_state(run)["model"]
    for name, value in reference.replica.model.state_dict().items():
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("nodes", ["ab", pytest.param("aab", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(nodes: str, tmp_path: Path) -> None:
    whole = train_on(list(nodes), TARGET, plan("onebit"), tmp_path / "whole")
    train_on(list(nodes), TARGET, plan("onebit", steps=10), tmp_path / "parted")
    parted = train_on(list(nodes), TARGET, plan("onebit"), tmp_path / "parted", resume=True)
    expected, got = final_tensors(whole), final_tensors(parted)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_an_optimizer_without_a_second_moment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"needs torch\.optim\.AdamW"):
        train_on(["a", "b"], TARGET, plan("onebit"), tmp_path / "run", settings=["optimizer=sgd"])


def test_on_one_machine_nothing_is_compressed_and_the_optimizer_is_left_alone(tmp_path: Path) -> None:
    plain, told = (
        train_on(["a", "a"], TARGET, text, tmp_path / name)
        for name, text in (
            ("plain", plan_text("bucket_mb = 0.0005")),
            ("told", plan("onebit").replace('form = "flat"', "")),
        )
    )
    assert events_of(told, "step")[-1]["loss"] == events_of(plain, "step")[-1]["loss"]
