"""Errors a user can act on. Each is one line: what was expected, what came, what to do."""


class DefenseError(Exception):
    """Base of all errors the commands show as one line with exit code 2."""


class DataError(DefenseError):
    """The data set cannot be used: a corrupt image, an empty class, a missing download."""


class ArtifactError(DefenseError):
    """A file between stages is missing, truncated, edited or made for something else."""


class NumericalError(DefenseError):
    """A computation left the finite numbers: NaN loss, eigenvalues that are not finite."""


class UnsupportedLayerError(DefenseError):
    """A model holds no layer, or a layer, that EK-FAC cannot treat."""


class EvidenceError(DefenseError):
    """Evidence for a release is missing or does not match its hash (gate exit code 3)."""
