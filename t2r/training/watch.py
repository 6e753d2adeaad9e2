"""What a run shows while it goes on, and how it stops when it is asked to."""

import os
import signal
import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback

from t2r.training.stages import Stage


class ProgressLine(TrainerCallback):
    """One line on stderr over all stages: steps, loss, tokens/s, time left. Gone when its context ends, however."""

    def __init__(self, stages: list[Stage]):
        self.console = Console(stderr=True)
        self.total = stages[-1].steps_before + stages[-1].steps
        self.progress: Progress | None = None
        self.stage = stages[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def begin(self, trainer: Trainer) -> None:
        """Say whose stage comes."""
        self.stage = trainer.stage

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        """Start the line."""
        if not state.is_world_process_zero:
            return
        columns = (TextColumn(self.stage.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        done = self.stage.steps_before + state.global_step
        self.task = self.progress.add_task("", total=self.total, completed=done, note="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Move on."""
        # What is not logged before a checkpoint would be missing in the resumed run's log; the last steps count too.
        control.should_log |= control.should_save or state.global_step >= state.max_steps
        if self.progress:
            self.progress.update(self.task, completed=self.stage.steps_before + state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        """Show loss and throughput."""
        if self.progress and "loss" in (logs or {}):
            note = f"loss {logs['loss']:.4f} · {logs['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, note=note)
            if not self.console.is_terminal:
                place = f"step {self.stage.steps_before + state.global_step}/{self.total}"
                self.console.print(f"{self.stage.name} {place} · {note}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Stop the line."""
        self._stop()

    def _stop(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


class Terminated(SystemExit):
    """A run was asked to stop, has saved a checkpoint and stopped; exits as a process that SIGTERM ends does."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM (pre-emption), save a checkpoint after the step at hand and stop, on all processes at once."""

    def __init__(self, accelerator):
        self.accelerator, self.asked, self.stopped = accelerator, False, False

    def __enter__(self):
        self.in_charge = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
        if self.in_charge:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_):
        if self.in_charge:
            signal.signal(signal.SIGTERM, self.before)
            if self.asked and not self.stopped:  # it came behind the last step, whose checkpoint there is
                os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, *_):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Stop after this step if any process was asked to."""
        if self.asked:
            self.accelerator.set_trigger()
        if self.accelerator.num_processes == 1:
            self.stopped = self.asked
        else:
            self.stopped = self.accelerator.check_trigger()
        if self.stopped:
            control.should_log = control.should_save = control.should_training_stop = True
