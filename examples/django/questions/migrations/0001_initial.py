"""The table of questions."""

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    dependencies = ()
    operations = (
        migrations.CreateModel(
            name="Question",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False)),
                ("customer", models.CharField(max_length=100)),
                ("text", models.TextField()),
                ("run_id", models.CharField(blank=True, max_length=256)),
                ("answer", models.TextField(blank=True)),
            ],
        ),
    )
