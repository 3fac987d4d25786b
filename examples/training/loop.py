"""Training: the network, the steps, the evaluation, and resuming."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from eca_fused.models import BasicBlock, ResNet, set_fused

from . import checkpoint
from .digits import CLASSES, load_digits, mixed, portions, shifted, training_batch
from .options import Options, UsageError
from .processes import Processes, average_statistics, launched, spread

__all__ = ["History", "Run", "check"]


@dataclass
class History:
    """The results of the steps so far.

    Attributes:
        losses: of each step, the mean over the images of all processes.
        correct: after each epoch, how many of the held-out images were recognised.
        held_out: the number of held-out images.
        steps_per_epoch: the number of steps in an epoch.
    """

    losses: list[float] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    held_out: int = 0
    steps_per_epoch: int = 0

    def accuracy(self) -> float:
        """The accuracy after the last epoch, from 0 to 1."""
        return self.correct[-1] / self.held_out


def check(options: Options, world: int, samples: int) -> None:
    """Raise UsageError unless the options fit each other and the processes and images."""
    if options.parallel == "fsdp" and not launched():
        raise UsageError(
            "--parallel fsdp: expected several processes; start them with "
            "`torchrun --nproc-per-node 2 examples/train.py --parallel fsdp`"
        )
    if options.batch_size > samples:
        raise UsageError(
            f"--batch-size {options.batch_size}: expected at most {samples}, as many as there are "
            "images; lower it, or raise --samples"
        )
    if options.batch_size % world:
        raise UsageError(
            f"--batch-size {options.batch_size}: expected a multiple of {world}, as {world} "
            f"processes share it equally; use {world * -(-options.batch_size // world)}"
        )
    if options.compile and options.compile not in torch.compiler.list_backends(()):
        known = ", ".join(sorted(torch.compiler.list_backends(())))
        raise UsageError(f"--compile {options.compile}: expected one of {known}")


class Run:
    """A training run, from the start or from a checkpoint.

    Args:
        options: what to train and how.
        at: this process among the others.

    Raises:
        UsageError: the options contradict each other, or a checkpoint does not fit.
    """

    def __init__(self, options: Options, at: Processes) -> None:
        self.options, self.at = options, at
        self.training, self.held_out = load_digits(options.samples)
        check(options, at.world, len(self.training))
        self.steps_per_epoch = len(self.training) // options.batch_size
        self.steps = options.epochs * self.steps_per_epoch
        self.history = History([], [], len(self.held_out), self.steps_per_epoch)
        self.pending: list[Tensor] = []  # losses of steps that the processes have not yet summed
        self.step = 0
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = spread(self.network(), options.parallel, at)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.scheduler = OneCycleLR(
            self.optimizer, options.lr, total_steps=self.steps + 1, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler(
            at.device.type, init_scale=2.0**12, enabled=options.precision == "float16"
        )
        self.resume()

    def network(self) -> nn.Module:
        """The network, the same in every process."""
        torch.manual_seed(self.options.seed)
        model = ResNet(BasicBlock, self.options.layers, None, CLASSES).to(self.at.device)
        set_fused(model, not self.options.plain)
        # FSDP shards contiguous weights only; convolutions follow the layout of their input.
        if self.options.parallel == "ddp":
            model.to(memory_format=self.layout)
        if self.options.compile:
            # Under FSDP each block is compiled separately, so the same code has many versions.
            torch.compiler.config.recompile_limit = 64
            # torch.compile warns on every machine without a GPU.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            model.compile(backend=self.options.compile, dynamic=False)
        return model

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        options = self.options
        found = self.at.agree(checkpoint.newest(options.checkpoint))
        if found is None:
            return
        if not options.resume:
            raise UsageError(
                f"{found} exists from an earlier run; continue it with --resume, or choose "
                "another folder with --output"
            )
        state = checkpoint.read_state(found)
        checkpoint.check_options(found, state["options"], options.determining())
        checkpoint.load_tensors(found, self.model, self.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.step = state["step"]

    def train(self, report: Callable[[], None]) -> History:
        """Run the remaining steps, and call report after each."""
        while self.step < self.steps:
            self.pending.append(self.one_step())
            self.step += 1
            ended = self.step % self.steps_per_epoch == 0
            if ended or self.step % self.options.save_every == 0:
                self.meet()
                if ended:
                    self.history.correct.append(self.evaluate())
                self.save()
            report()
        return self.history

    def one_step(self) -> Tensor:
        """Train on this process's part of the next batch; return its mean loss, on the device."""
        options, at = self.options, self.at
        epoch, number = divmod(self.step, self.steps_per_epoch)
        batch = training_batch(len(self.training), options.batch_size, options.seed, epoch, number)
        mine = batch[at.rank :: at.world]
        # A step's random numbers depend on its number alone, so a resumed run draws the same.
        torch.manual_seed(mixed(options.seed, self.step, at.rank))
        images = self.prepared(shifted(self.training.images[mine]))
        labels = self.training.labels[mine].to(at.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(self.model(images).float(), labels)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach()

    def prepared(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.layout).to(self.at.device)

    def autocast(self) -> torch.autocast:
        # FSDP's own MixedPrecisionPolicy would also round taps and batch norms. Autocast leaves
        # them in float32, under DDP and FSDP. ECA takes float32 taps with x of any dtype.
        dtype = getattr(torch, self.options.precision)
        enabled = dtype != torch.float32
        return torch.autocast(self.at.device.type, dtype if enabled else None, enabled=enabled)

    def meet(self) -> None:
        """Combine the losses and the batch norm statistics of all processes."""
        losses = self.at.sum(torch.stack(self.pending).double()) / self.at.world
        self.history.losses += losses.tolist()
        self.pending.clear()
        average_statistics(self.model, self.at)

    @torch.no_grad()
    def evaluate(self) -> int:
        """How many of the held-out images the network recognises; each counts once."""
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.at.device)
        batch = max(self.options.batch_size, self.at.world)
        for mine, counts in portions(len(self.held_out), batch, self.at.rank, self.at.world):
            with self.autocast():
                logits = self.model(self.prepared(self.held_out.images[mine]))
            found = logits.argmax(1) == self.held_out.labels[mine].to(self.at.device)
            correct += found.sum() * counts
        return int(self.at.sum(correct))

    def save(self) -> None:
        state = {
            "step": self.step,
            "options": self.options.determining(),
            "history": asdict(self.history),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.save(self.options.checkpoint, self.model, self.optimizer, state, self.at)
