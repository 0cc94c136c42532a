"""One rank's stages in a pipeline: how a model becomes them, and how micro-batches run through them.

The schedules are torch.distributed.pipelining's. What a stage takes and gives is worked out beforehand without
computing anything, so that no description has to be received, and unpickled, from another rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from shoal.engine.layout.pipeline.trace import StageGraph, tensors_of
from shoal.strategy.layout.config import LayoutConfig

_SCHEDULES: dict[str, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Stage(nn.Module):
    """A stage as the schedules see it: it takes a micro-batch's number, and finds the model's own inputs by it."""

    def __init__(self, graph: StageGraph) -> None:
        super().__init__()
        self.graph = graph
        self.inputs: list[Mapping[str, Any]] = []

    def forward(self, *taken: Tensor, number: Tensor | None = None) -> Any:
        """Compute on from what the stage before gave; the first stage is given the number alone."""
        if not self.graph.takes:
            number, taken = taken[0], ()
        assert number is not None
        return self.graph(taken, self.inputs[int(number)])


class _KnownStage(PipelineStage):
    """A stage whose inputs and outputs are known: nothing is tried out, so nothing has to be cleaned up.

    Attributes:
        busy_s: seconds spent computing.
    """

    busy_s = 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().backward_weight_one_chunk, *args, **kwargs)

    def _timed(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.busy_s += time.perf_counter() - started

    def _post_metadata_inference_cleanup(self) -> None:
        """The library's clears gradients, also those of micro-batches of another size before."""


@dataclass(frozen=True)
class _Form:
    """What enters and leaves a stage, as examples without values."""

    takes: tuple[Tensor, ...]
    gives: tuple[Tensor, ...]


class Line:
    """The pipeline that a rank is part of."""

    def __init__(
        self,
        skeleton: Sequence[StageGraph],
        own: Mapping[int, Stage],
        config: LayoutConfig,
        device: torch.device,
        group: dist.ProcessGroup,
        *,
        autocast: bool,
    ) -> None:
        """`skeleton`: all stages on the device meta; `own`: this rank's, by their numbers in the pipeline."""
        self._skeleton = skeleton
        self._own = own
        self._config = config
        self._device = device
        self._group = group
        self._autocast = autocast
        self.layers: list[list[str]] = [[] for _ in skeleton]
        self._forms: dict[Any, list[_Form]] = {}
        self._schedules: dict[Any, Any] = {}
        self._score: Callable[[Any, int], Tensor] | None = None
        self._pipelines: list[_KnownStage] = []
        self._training_s = 0.0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the model's outputs."""
        return len(self._skeleton) - 1 in self._own

    def run(
        self, inputs: Sequence[Mapping[str, Any]], score: Callable[[Any, int], Tensor], *, train: bool
    ) -> list[Any]:
        """Send micro-batches of one shape through all stages, and their gradients back. Collective over the pipeline.

        Args:
            inputs: for each micro-batch the model's own inputs.
            score: (the model's outputs, the micro-batch's number) -> the number to take the gradient of; called on the
                last stage.

        Returns:
            The scores, on the last stage.
        """
        for stage in self._own.values():
            stage.inputs = list(inputs)
        self._score = score
        schedule = self._schedule(inputs[0], len(inputs), train=train)
        started = time.perf_counter()
        numbers = torch.arange(len(inputs), device=self._device)
        losses: list[Tensor] = []
        step = schedule.step if train else schedule.eval
        target = numbers if self.is_last else None
        if 0 in self._own:
            step(numbers, number=numbers, target=target, losses=losses, **({"return_outputs": False} if train else {}))
        else:
            step(number=numbers, target=target, losses=losses, **({"return_outputs": False} if train else {}))
        if train:
            self._training_s += time.perf_counter() - started
        return losses

    @property
    def bubble(self) -> float:
        """The part of the training's time in which this rank computed nothing: the measured bubble."""
        busy_s = sum(stage.busy_s for stage in self._pipelines)
        return max(0.0, 1 - busy_s / self._training_s) if self._training_s else 0.0

    def _schedule(self, example: Mapping[str, Any], count: int, *, train: bool) -> Any:
        key = (_shapes(example), count, train)
        if key not in self._schedules:
            forms = self._form(example)
            stages = [self._stage(number, forms[number]) for number in self._own]
            if train:
                self._pipelines += stages
            own: Any = stages[0] if len(stages) == 1 else stages
            kind = self._kind(count, train=train)
            self._schedules[key] = kind(own, count, loss_fn=self._loss, scale_grads=False)
        return self._schedules[key]

    def _kind(self, count: int, *, train: bool) -> type[Any]:
        """The plan's schedule; where so few micro-batches are left that it has no order for them, the plainest."""
        ranks = self._config.pipeline
        fits = (
            count >= len(self._skeleton) if len(self._own) == 1 else count % min(count, ranks) == 0 and count >= ranks
        )
        if train and fits:
            return _SCHEDULES[self._config.schedule]
        return ScheduleGPipe if len(self._own) == 1 else ScheduleLoopedBFS

    def _loss(self, outputs: Any, number: Tensor) -> Tensor:
        assert self._score is not None
        return self._score(outputs, int(number))

    def _stage(self, number: int, form: _Form) -> _KnownStage:
        first = torch.zeros(1, dtype=torch.long, device=self._device)
        return _KnownStage(
            self._own[number],
            number,
            len(self._skeleton),
            self._device,
            input_args=form.takes or (first,),
            output_args=form.gives,
            group=self._group,
        )

    def _form(self, example: Mapping[str, Any]) -> list[_Form]:
        """Follow one micro-batch's shapes through all stages."""
        key = _shapes(example)
        if key in self._forms:
            return self._forms[key]
        forms: list[_Form] = []
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inputs = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in example.items()}
            taken: tuple[Tensor, ...] = ()
            for graph in self._skeleton:
                with torch.enable_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    given = _compute(graph, taken, inputs, self._device)
                names = graph.gives or [f"output {place}" for place in range(len(given))]
                given = tensors_of(given, names) if graph.gives else tuple(v for v in given if isinstance(v, Tensor))
                forms.append(_Form(_examples(taken), _examples(given)))
                taken = tuple(value.detach().requires_grad_(value.requires_grad) for value in given)
        self._forms[key] = forms
        return forms


def _compute(graph: StageGraph, taken: tuple[Tensor, ...], inputs: Mapping[str, Any], device: torch.device) -> Any:
    state = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).requires_grad_(t.requires_grad)
        for name, t in [*graph.named_parameters(), *graph.named_buffers()]
    }
    given = torch.func.functional_call(graph, state, (taken, inputs), tie_weights=True)
    return given if isinstance(given, tuple | list) else (given,)


def _examples(fakes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same shapes as tensors on the device meta."""
    return tuple(
        torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device="meta").requires_grad_(f.requires_grad)
        for f in fakes
    )


def _shapes(example: Mapping[str, Any]) -> Any:
    return tuple(
        (name, tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (name, repr(v)) for name, v in example.items()
    )
