-- Takes notices that a worker has handled out of its box. A cancel request stays there until its run ends.
-- Returns how many were in the box
if #notices == 0 then return 0 end
return redis.call('SREM', k.worker_box(incarnation), unpack(notices))
