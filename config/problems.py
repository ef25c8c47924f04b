"""What the light parts of the configuration need: nothing but the standard library."""

PREFIX = "TAILRACE_"


class ConfigError(Exception):
    """The service cannot start as configured: ``problems`` holds one line for each reason, for the operator."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)
