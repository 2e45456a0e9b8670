"""What others offer for the same work: TRL's PPO trainer and torchao's offloaded AdamW, installed when a contest needs them.

Neither is a dependency. Knows their constructors; does not know what is measured.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from rlhf_nb_utils.config import CourseError

PACKAGES = {"trl": ("trl==1.12.0", "accelerate>=1.4"), "torchao": ("torchao==0.18.0",)}  # module -> what pip installs


class PeerError(CourseError):
    """A peer that does not do what it is asked."""


class Trainer:
    """TRL's PPO trainer, stopped after each iteration until it is called again; with or without its garbage collections.

    ``make(PPOConfig, PPOTrainer, callback)`` builds it.
    """

    def __init__(self, make):
        with contextlib.redirect_stdout(None):
            from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        self._module, self._collect = ppo_trainer, ppo_trainer.gc
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self._failure: BaseException | None = None
        trainer = make(PPOConfig, PPOTrainer, self._pause())
        trainer.log = lambda *_, **__: None
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def _run(self, trainer) -> None:
        try:
            self._go.acquire()
            trainer.train()
        except BaseException as error:  # to be raised where somebody waits
            self._failure = error
        finally:
            self._ended = True
            self._done.release()

    def _pause(self):
        from transformers import TrainerCallback

        peer = self

        class Pause(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                peer._done.release()
                peer._go.acquire()
                return control

        return Pause()

    def iterate(self, collects: bool) -> None:
        self._module.gc = self._collect if collects else SimpleNamespace(collect=lambda: None)
        self._go.release()
        self._done.acquire()
        if self._failure or self._ended:
            raise PeerError(f"the peer stopped: {self._failure or 'it ran out of episodes'}")


def arguments(folder: Path, setting, mini_batches: int, epochs: int, device: str) -> dict:
    """TRL's settings for a contest: the same batch, minibatches, epochs and lengths, and nothing that only it would do."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": setting.batch, "gradient_accumulation_steps": 1,
        "num_mini_batches": mini_batches, "num_ppo_epochs": epochs, "total_episodes": setting.batch * 10_000,
        "response_length": setting.response, "local_rollout_forward_batch_size": setting.batch, "learning_rate": 1e-5,
        "report_to": "none", "num_sample_generations": 0, "logging_strategy": "no", "save_strategy": "no", "bf16": False,
        "use_cpu": device == "cpu", "temperature": 1.0, "disable_tqdm": True,
    }  # fmt: skip


def offloaded_adamw(parameters) -> torch.optim.Optimizer:
    """torchao's AdamW with its states on the host; it takes gradients from the backward pass, and cannot clip."""
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=1e-5)
