"""The errors a user may meet. Every message reads: setting=value, the rule it breaks, what to do."""


class HydraError(Exception):
    """Base of all errors raised on purpose; the CLI prints the message without a traceback."""


class ConfigError(HydraError, ValueError):
    """A setting is wrong, or two settings contradict each other. CLI exit code 2."""


class DataError(HydraError, ValueError):
    """Input data is missing or malformed. CLI exit code 2."""


class UnsupportedModelError(HydraError, ValueError):
    """The model lacks something the shared base needs; the message names it. CLI exit code 2."""


class RoleError(HydraError, RuntimeError):
    """A role was used in a way that would give wrong numbers."""


class NonFiniteError(HydraError, ArithmeticError):
    """A loss, gradient, score or reward is NaN or infinite. CLI exit code 1."""


class RewardError(HydraError, RuntimeError):
    """A reward source raised, or returned something other than one number per response. CLI exit code 1."""


class CheckpointError(HydraError, RuntimeError):
    """A checkpoint could not be written or read. CLI exit code 1."""


class OutOfMemory(HydraError, MemoryError):
    """Memory ran out with the smallest piece of work there is. CLI exit code 1."""


class StorageError(HydraError, OSError):
    """A file of the run folder could not be written. CLI exit code 1."""


class RankError(HydraError, RuntimeError):
    """Another process of the run failed, does not answer, or has come apart from this one. CLI exit code 1."""


class ServerError(HydraError, RuntimeError):
    """A server that samples cannot be asked, or answers what no response can be made of. CLI exit code 1."""
