"""The root of every error this project raises on purpose."""


class FedMetaNASError(Exception):
    """Something this project noticed and can explain in one line."""


class RefusalError(FedMetaNASError):
    """Bad input, found before any work started. The message says what, where and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}".replace("\n", " "))
        self.what, self.fix = what, fix


class RunFailedError(FedMetaNASError):
    """A run that had started could not go on."""


class ProcessDiedError(RunFailedError):
    """A process of the run died and will not come back, while the run's last state is whole."""
