"""The fMRI room: time series of any ROI, cleaned; patterns decoded from them; groups of subjects.

``clean`` removes drift, confounds and scrubbed volumes; ``masks`` says which voxels an ROI has;
``mvpa`` decodes labels or targets with cross-validation by run and permutation tests; ``glm`` models
conditions and single trials; ``searchlight`` decodes around every voxel; ``sources`` say where series
lie, ``maps`` put values on the scan's grid; ``group`` tests the subjects' results. Reading files is
``raypipe.read``. No ray anywhere here.
"""
