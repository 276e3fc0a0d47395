"""What `plan` and `train --dry-run` assume: rates of GPUs, and what these, storage and requests cost."""

from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field

from teachercache.pipeline.records.strict import Strict

GpuName = Literal["a100", "h100", "h200", "l40s", "rtx4090", "rtx5090"]


class Gpu(NamedTuple):
    """TFLOP/s in bfloat16: the data sheet's peak (dense), and what teachers' forward passes and a training
    sustain, "computed" as 30% and 20% of it or "measured". `usd_per_hour`: a round price on demand."""

    peak: float
    forward: float
    training: float
    usd_per_hour: float
    origin: str = "computed"


GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(312, 94, 62, 2),
    "h100": Gpu(989, 300, 200, 3),
    "h200": Gpu(989, 300, 200, 3.5),
    "l40s": Gpu(362, 110, 72, 1),
    "rtx4090": Gpu(165, 50, 33, 0.5),
    "rtx5090": Gpu(210, 63, 42, 0.8),
}


class PlanRecipe(Strict):
    """What `teachercache plan` assumes; state what you see and pay.

    Prices are S3 Standard's; a request reads a row of one array. `render_ms` was measured.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    gpu: GpuName = Field("h100", description="For the rate and the price that are not stated.")
    gpus: int = Field(8, ge=1, description="How many build, and train later.")
    teacher_tflops_per_gpu: float | None = Field(None, gt=0, description="Forward passes; null: by the gpu.")
    measure_s: float = Field(30, gt=0, description="How long `--measure` tries, in seconds.")
    student_images_per_s: float = Field(1000, gt=0, description="Images that a training takes, on all GPUs.")
    runs: int = Field(1, ge=1, description="Trainings that read the cache.")
    epochs: float = Field(30, gt=0, description="Passes of each training.")
    months: float = Field(1, ge=0, description="How long the cache is kept.")
    usd_per_gpu_hour: float | None = Field(None, ge=0, description="Price of a GPU; null: that of the gpu.")
    usd_per_tb_month: float = Field(23, ge=0, description="Price of keeping 10¹² bytes.")
    usd_per_million_requests: float = Field(0.4, ge=0, description="Price of reading rows; free in a folder.")
    storage_gb_per_s: float = Field(10, gt=0, description="10⁹ bytes a second, for all GPUs together.")
    render_ms: float = Field(6.5, gt=0, description="A student's view on a core; 6 to 7 at 384².")
    cores_per_gpu: int = Field(12, ge=1, description="Cores that render for each GPU.")

    @property
    def tflops(self) -> float:
        return self.teacher_tflops_per_gpu or GPUS[self.gpu].forward

    @property
    def gpu_usd_per_s(self) -> float:
        price = self.usd_per_gpu_hour
        return (GPUS[self.gpu].usd_per_hour if price is None else price) / 3600
