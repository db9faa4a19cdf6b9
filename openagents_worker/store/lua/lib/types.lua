-- A key of another type than the table of keys says: nothing of ours can be in it. Where the rest can go on without it, it is moved out of
-- the way, and the command is given again as if the key had not been there. Else the script ends with an error that names the key;
-- whoever writes looks at such keys first (`needs`), so that nothing is half written. While all types are right it costs next to nothing.
local given, tried = redis.call, redis.pcall

local function is_wrong_type(answer) return type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE', 1, true) end

-- aside(): what is done about such keys. Redis makes every function anew at every call: these only where they are needed
local function aside()
  local MOST_NOTED = 1000
  local A = {}
  local t = given('TIME')
  local at_us = string.format('%.0f', t[1] * 1000000 + t[2])

  function A.type_of(key) return given('TYPE', key).ok end

  local function rename(key)
    local name = k.aside_key(string.sub(key, #P + 2) .. '@' .. at_us)
    given('RENAME', key, name)
    given('PEXPIRE', name, RUN_TTL_MS)
    return name
  end

  -- note(key, code, what, more): an entry for those who look after the deployment; `more` is JSON with its leading comma
  function A.note(key, code, what, more)
    local said = ',"key":' .. cjson.encode(key) .. ',"code":"' .. code .. '","what":' .. cjson.encode(what) .. (more or '') .. '}'
    local newest = tried('LINDEX', k.aside(), 0)
    if is_wrong_type(newest) then
      rename(k.aside())
    elseif newest and string.sub(newest, -#said) == said then
      return -- the same once more
    end
    given('LPUSH', k.aside(), '{"at_us":' .. at_us .. said)
    given('LTRIM', k.aside(), 0, MOST_NOTED - 1)
    given('PEXPIRE', k.aside(), RUN_TTL_MS)
  end

  -- move(key): what stands there is kept under another name
  function A.move(key)
    local found = A.type_of(key)
    local name = rename(key)
    A.note(key, 'redis.wrong_type', 'it was a ' .. found .. ', which is not what this library keeps there, and was moved',
      ',"moved_to":' .. cjson.encode(name))
  end

  function A.is_left_in_place(key)
    local name = string.sub(key, #P + 2)
    for _, pattern in ipairs(LEFT_IN_PLACE_PATTERNS) do if string.find(name, pattern) then return true end end
    return false
  end

  function A.fail(key) error('OA_WRONG_TYPE ' .. key .. ' ' .. A.type_of(key) .. ' ') end
  return A
end

local redis = {pcall = redis.pcall, error_reply = redis.error_reply, acl_check_cmd = redis.acl_check_cmd}
function redis.call(...)
  local answer = tried(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if is_wrong_type(answer) then
    local _, key = ...
    local A = aside()
    if A.is_left_in_place(key) then A.fail(key) end
    if A.type_of(key) ~= 'none' then A.move(key) end
  end
  return given(...) -- which raises what is wrong with it in Redis's own way
end
