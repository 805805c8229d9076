"""What one step is made of: tensors with gradients, state, device scalars, what is in flight.

``spec`` says what a rule and a step are, as data. ``collect`` finds the tensors of a pass,
``state`` their state, ``scalars`` the numbers that live on the device; ``flight`` holds what lives
from the first pass to the second, and ``checkpoint`` what is saved. Nothing here knows an
optimizer class.
"""
