"""What keeps a run's work: the lock, the watchdog, failures and their replay, preemption."""
