"""Training stages: data of flights, losses and loops of every model."""
