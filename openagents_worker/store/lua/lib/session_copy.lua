--#include session
-- Copies of sessions.

-- session_exists(S): whether there is anything under this id
local function session_exists(S)
  for _, key in ipairs(session_keys(S)) do
    if redis.call('EXISTS', key) == 1 then return true end
  end
  return false
end

-- keep_first(from, to, count): copies a list, of which the first `count` items are kept
local function keep_first(from, to, count)
  if redis.call('EXISTS', from) == 0 then return end
  redis.call('COPY', from, to, 'REPLACE')
  if count == 0 then redis.call('UNLINK', to) else redis.call('LTRIM', to, 0, count - 1) end
end

local TURNS_OF_MEMORY = 'memory_buffer' -- the key of the state where the built-in memories keep the turns of the session (`memory/buffer.py`)

-- copy_summaries(from, to, messages): copies the summaries of the first messages, in order; epochs are counted from 1
local function copy_summaries(from, to, messages)
  for epoch = 1, epoch_of(from) do
    local count_name, text_name = 'compacted:' .. digits(epoch), 'compaction:' .. digits(epoch)
    local found = redis.call('HMGET', k.session(from), count_name, text_name)
    if not found[2] or count_of(found[1]) > messages then return end
    redis.call('HSET', k.session(to), 'epoch', digits(epoch), count_name, found[1], text_name, found[2])
  end
end

-- copy_session(from, to, messages, artifacts): creates the session `to` with the first messages and artifacts of another one, and with its state.
-- If the other session has gone on since then, its memory of turns is not copied: a model would see turns that are not in the transcript
local function copy_session(from, to, messages, artifacts)
  keep_first(k.transcript(from), k.transcript(to), messages)
  keep_first(k.artifacts(from), k.artifacts(to), artifacts)
  if redis.call('EXISTS', k.session_state(from)) == 1 then redis.call('COPY', k.session_state(from), k.session_state(to), 'REPLACE') end
  if redis.call('LLEN', k.transcript(from)) > messages then redis.call('HDEL', k.session_state(to), TURNS_OF_MEMORY) end
  redis.call('HSET', k.session(to), 'version', 0, 'forked_from', from)
  copy_summaries(from, to, messages)
  local format = session_format(from)
  if format > 0 then redis.call('HSET', k.session(to), 'format', digits(format)) end
end
