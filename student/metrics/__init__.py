"""Metrics of the students' tasks: streaming, mergeable, the same on any number of processes.

metric = MeanIoU(num_classes=21)
metric.update(prediction_BHW, target_BHW)                       for every batch
metric.reduce(lambda x: accelerator.reduce(x.to(accelerator.device), "sum").cpu())
metric.compute()
"""

from teachercache.student.metrics.boundary import BoundaryBenchmark
from teachercache.student.metrics.dense import RMSE, MaxF, MeanAngularError, MeanIoU, mtl_gain
from teachercache.student.metrics.sum_metric import Top1

__all__ = ["RMSE", "BoundaryBenchmark", "MaxF", "MeanAngularError", "MeanIoU", "Top1", "mtl_gain"]
