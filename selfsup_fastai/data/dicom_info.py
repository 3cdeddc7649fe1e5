"""What was done to the pixels of a DICOM file: a record without anything that identifies."""

from dataclasses import dataclass, field

__all__ = ["FLAGS", "DicomInfo"]

FLAGS = {
    "all_padding": "every pixel is padding, so none is taken for padding",
    "assumed": "an element on the pixels' form is missing and was assumed",
    "bad_rescale": "the rescale lacks its slope or its intercept, so it is left out",
    "bad_window": "the file has no window that makes sense, so the modality's default is used",
    "burned_in": "the file says that text is burned in",
    "burned_in_risk": "images of this kind often have text burned in",
    "constant": "all pixels have one value",
    "for_processing": "the image is meant for processing, not for viewing",
    "lossy": "compressed with loss at some time",
    "no_rescale": "a CT without rescale: the values may not be Hounsfield units",
    "not_ct": "a window in Hounsfield units on an image that is no CT",
    "not_subsampled": "the color is not subsampled, whatever the file says",
    "presentation": "the photometric interpretation and the presentation LUT shape contradict each other",
    "regions": "regions of the ultrasound image are stated; all of it is kept",
    "suspicious_range": "a CT whose values lie within 0..4095: they may not be Hounsfield units",
    "wrong_syntax": "the pixel data is not in the form that the transfer syntax states",
}
"""What may be said of a file, and what it means."""

MODALITIES = {"BI", "BMD", "CR", "CT", "DG", "DX", "EC", "EM", "ES", "GM", "IO", "IVOCT", "IVUS", "LS"}
MODALITIES |= {"MG", "MR", "NM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OT", "PT", "PX"}
MODALITIES |= {"RF", "RG", "RTIMAGE", "SC", "SM", "ST", "TG", "US", "VL", "XA", "XC", "XRF"}
"""What is shown of the element Modality; anything else may be a name."""


@dataclass
class DicomInfo:
    """The steps from a file to an array, in their order. `str` gives one line; neither identifies anybody."""

    modality: str = ""
    """As the standard defines it, else ''."""
    height: int = 0
    width: int = 0
    frames: int = 1
    """In the file."""
    frame: int | None = 0
    """The one that was read; None: all of them."""
    bits: int = 0
    """Stored in each sample."""
    photometric: str = ""
    """What the file says that its numbers are."""
    syntax: str = ""
    """The standard's name for the compression."""
    decoder: str = ""
    """Of compressed pixels."""
    padding: float = 0.0
    """Share of the pixels that is padding."""
    rescale: str = ""
    """How stored numbers became values: '' for not at all."""
    hounsfield: bool = False
    """Whether the values are taken for Hounsfield units (and cut to -1024..3071)."""
    color: str = ""
    """Steps between color and grey."""
    window: str = ""
    """What became 0 and 1."""
    inverted: bool = False
    """Whether the lightest became the darkest, as the file asks for."""
    flags: list[str] = field(default_factory=list)
    """Keys of `FLAGS`."""

    def __str__(self) -> str:
        which = "all frames" if self.frame is None else f"frame {self.frame}"
        of = f", {which} of {self.frames}" if self.frames > 1 else ""
        what = f"{self.modality or 'unknown modality'}, {self.height} x {self.width}{of}, {self.bits} bits"
        how = f"{self.photometric}, {self.syntax}" + (f" by {self.decoder}" if self.decoder else "")
        steps = [what, how]
        if self.padding:
            steps.append(f"{self.padding:.1%} padding")
        if self.rescale:
            steps.append(f"rescaled by {self.rescale}" + (" to HU" if self.hounsfield else ""))
        steps += [step for step in (self.color, self.window and f"window {self.window}") if step]
        if self.inverted:
            steps.append("inverted")
        notes = "; ".join(FLAGS[flag] for flag in self.flags)
        return "; ".join(steps) + (f". Note: {notes}." if notes else ".")

    def flag(self, *names: str) -> None:
        """Add flags, each once."""
        self.flags += [name for name in dict.fromkeys(names) if name not in self.flags]
