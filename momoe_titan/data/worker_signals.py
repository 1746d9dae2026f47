"""Keeps worker processes of a data loader alive when a signal stops the run, so that its last step can be trained."""

import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals(worker_id: int) -> None:
    """In a worker process: ignore Ctrl-C and SIGTERM, except a SIGTERM of the process that started it.

    Launchers and terminals signal a whole group of processes. torch's workers die of it, and the step in which the
    trainer stops would fail for want of data. torch ends its workers otherwise: it tells them, or it signals them
    itself, and they end when their parent has died.

    Args:
        worker_id: for torch's `worker_init_fn`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while True:
        heard = signal.sigwaitinfo(SIGNALS)
        if heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            os._exit(0)
