class EmulatorError(RuntimeError):
    """The program does what real hardware forbids (or would hang on), or uses PTX that the emulator does not know."""
