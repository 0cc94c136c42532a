"""How one replica of the model lies over ranks: the axes, where each rank stands on them, and which values it holds."""
