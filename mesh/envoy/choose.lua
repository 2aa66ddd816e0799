-- Chooses the cluster of a call by the model that it names. Runs for every call, so it does little.
-- Above this text stand: HEADER, which names the model; PREFIX, the first part of clusters' names; MESH, the mesh's cluster; LIMIT,
-- the calls that a copy may have at once (0: any number; the mesh queues what is more); ADMITTED, the header of a caller that was
-- recognised before (empty: any caller). A body with a field that the mesh must read has set the header x-repertory-judge.

function envoy_on_route(handle)
  local headers = handle:headers()
  local name = headers:get(HEADER)
  if name == nil or headers:get("x-repertory-judge") ~= nil or (ADMITTED ~= "" and headers:get(ADMITTED) == nil) then
    return MESH
  end
  local cluster = PREFIX .. "/" .. name
  local found = handle:getCluster(cluster)
  if found == nil or (LIMIT > 0 and found:numRequests() >= LIMIT) then
    return MESH
  end
  return cluster
end
