-- Chooses the cluster of a call by the model that it names, for names that are not in the routes' table of names.
-- Above this text stand: HEADER, which names the model; PREFIX, the first part of clusters' names; MESH, the mesh's cluster; LIMIT,
-- the calls that a copy may have at once (0: any number; the mesh queues what is more).

function envoy_on_route(handle)
  local name = handle:headers():get(HEADER)
  if name == nil then
    return MESH
  end
  local cluster = PREFIX .. "/" .. name
  local found = handle:getCluster(cluster)
  if found == nil or (LIMIT > 0 and found:numRequests() >= LIMIT) then
    return MESH
  end
  return cluster
end
