from builtin_interfaces.msg import Time

class Clock:
    clock: Time
    def __init__(self, *, clock: Time = ...) -> None: ...
