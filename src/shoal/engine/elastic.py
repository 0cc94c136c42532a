"""stub"""


def is_asked_for(env):
    return "SHOAL_COORDINATOR" in env
