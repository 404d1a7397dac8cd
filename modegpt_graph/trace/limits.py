"""A constant that is a limit of the dtype that a module computes in."""


class DtypeLimit(float):
    """`sign * torch.finfo(dtype).name`, with its value in the dtype that the model has now."""

    name: str
    sign: int

    def __new__(cls, value: float, name: str, sign: int) -> "DtypeLimit":
        """value: in the model's dtype."""
        self = super().__new__(cls, value)
        self.name, self.sign = name, sign
        return self

    def written(self, dtype: str) -> str:
        """As Python. dtype: the expression of the dtype."""
        return f"{'-' if self.sign < 0 else ''}torch.finfo({dtype}).{self.name}"

    def __deepcopy__(self, _: dict) -> "DtypeLimit":
        return self
