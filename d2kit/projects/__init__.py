"""Parts of d2kit under the names of Detectron2's projects; they only re-export."""
