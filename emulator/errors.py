class EmulatorError(RuntimeError):
    """The program does something that real hardware forbids (or hangs on), or uses PTX unknown to the emulator."""
