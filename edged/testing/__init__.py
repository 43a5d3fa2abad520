"""For authors of mappers, and for our own tests: what a mapper is run against.

``conformance`` is the kit that any mapper must pass, ``faults`` cuts the power at every lasting effect, ``fake`` is a device
that boots only what is whole, ``node`` a whole engine in one object, ``avr`` a real boot loader on a simulated board.
"""
