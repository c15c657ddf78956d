"""The tree of errors that paretorch raises.

ParetorchError
├── CaptureError     the model could not be turned into a graph
├── InputError       an argument of a public call is wrong
├── ShapeError       types do not fit an op
├── VerifyError      a graph is not well formed, or a rewrite changed what it computes
├── RuleError        a rule's name is unknown, or a rule broke its contract
├── PlanError        a plan does not fit the graph it is applied to
├── LoweringError    a graph could not be lowered to a runtime
├── TargetError      no such device or runtime, or it is not usable here
├── BudgetError      a budget, its data or its metric cannot be used
└── ArtifactError    a saved artifact is damaged, foreign or cannot be written

A message says what is wrong, where in the user's model, what was expected and found, and what to do.
"""


class ParetorchError(Exception):
    """Root of all errors that paretorch raises on purpose."""


class CaptureError(ParetorchError):
    """The model could not be turned into a graph."""


class InputError(ParetorchError):
    """An argument of a public call is wrong."""


class ShapeError(ParetorchError):
    """Types do not fit an op."""


class VerifyError(ParetorchError):
    """A graph is not well formed, or a rewrite changed what it computes."""


class RuleError(ParetorchError):
    """A rule's name is unknown, or a rule broke its contract."""


class PlanError(ParetorchError):
    """A plan does not fit the graph it is applied to."""


class LoweringError(ParetorchError):
    """A graph could not be lowered to a runtime."""


class TargetError(ParetorchError):
    """No such device or runtime, or it is not usable here."""


class BudgetError(ParetorchError):
    """A budget, its data or its metric cannot be used."""


class ArtifactError(ParetorchError):
    """A saved artifact is damaged, foreign or cannot be written."""
