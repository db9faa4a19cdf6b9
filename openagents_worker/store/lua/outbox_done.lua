-- Removes ended runs of which a recipient was notified, or will not be notified any more (`ends`: run, life, run, life …).
-- Returns how many were in the outbox
local removed = 0
for i = 1, #ends, 2 do
  local entry = ends[i + 1] .. ':' .. ends[i]
  removed = removed + redis.call('ZREM', k.outbox(recipient), entry)
  redis.call('HDEL', k.outbox_tries(recipient), entry)
end
return removed
