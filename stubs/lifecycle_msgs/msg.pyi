class Transition:
    TRANSITION_CONFIGURE: int
    TRANSITION_ACTIVATE: int
