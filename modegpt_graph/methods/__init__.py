"""The field's other methods, as passes over the same traced graph, the same calibration and the same accounting."""
