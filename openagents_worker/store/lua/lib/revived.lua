--#include session
-- revived(run, begins, by): starts another life of a run that has ended, at the end of the queue of its session. `begins`: it has no checkpoint, and
-- starts again. Returns its wake-up if it becomes the holder. Event run.resumed.
-- A run that another one has delegated to reports to that run in this life only if it asks for it again: then `parent_life` is the life of that run
local function revived(run, begins, by, parent_life)
  local key = k.run(run.id)
  run.life, run.expires, run.on_busy = run.life + 1, 0, ''
  redis.call('HSET', key, 'state', STATE.queued, 'life', run.life, 'fence', next_fence(run), 'owner', '', 'stuck', 0, 'retries', 0,
    'emit_no', 0, 'resumed', digits(NOW_MS))
  redis.call('HDEL', key, 'cancel', 'cancel_reason', 'result', 'usage_in_all', 'ended', 'due', 'waits', 'untold', 'tellings', 'suspicion', 'expires', 'interrupted',
    'force_at', 'on_busy', 'parent_life', 'parent_ended')
  if parent_life then redis.call('HSET', key, 'parent_life', parent_life) end
  redis.call('ZREM', k.sent(run.queue), run.id)
  for _, fact in ipairs(redis.call('HKEYS', k.facts(run.id))) do
    if ENDS_WITH_LIFE[string.match(fact, '^(%w+):')] then redis.call('HDEL', k.facts(run.id), fact) end -- such as the count of retries
  end
  redis.call('PERSIST', k.children(run.id)) -- those that work in the background since an earlier life
  for _, name in ipairs(keys_of(run.id)) do redis.call('PERSIST', name) end
  append(run, {'run.resumed', '{"checkpoint_id":' .. (begins and 'null' or q(run.id .. ':step:' .. digits(run.steps))) .. ',"life":' .. digits(run.life)
    .. (by ~= '' and ',"by":' .. q(by) or '') .. '}'})
  return place(run)
end

-- may_begin_again(run): whether a run without a checkpoint may start again: no effect of it can be repeated, or it is durable
local function may_begin_again(run)
  return run.steps == 0 and (run.durable ~= '0' or run.attempt == 0) and (field_of(run.id, 'request') or '') ~= ''
end
