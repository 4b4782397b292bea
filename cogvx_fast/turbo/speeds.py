"""How many evaluations of the network a generation has, by the speed that is asked for."""

LEAST_EVALUATIONS = 4
# Steps of a generation for each evaluation, by name: 25 and 17 of 50.
SPEEDS = {"quality": 2.0, "fast": 50 / 17}
MOST_SPEED = 100
