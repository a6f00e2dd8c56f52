"""Models under the names of Detectron2's projects, each with config keys of its own."""
