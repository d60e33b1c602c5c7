#!lua flags=allow-oom
-- Enter the one group of the stream, made at id 0 if there is none.
-- KEYS 1 stream   ARGV 1 group 2 consumer   -> OK | OTHER group | BADKEY type
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'stream' and kind ~= 'none' then return {'BADKEY', kind} end
local found = false
if kind == 'stream' then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    if group[2] ~= ARGV[1] then return {'OTHER', group[2]} end
    found = true
  end
end
if not found then redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM') end
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])
return {'OK'}
